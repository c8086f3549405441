"""Random numbers that are functions of a key and a counter: drawn in any order, kept nowhere."""

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (0x85EBCA6B, 0xC2B2AE35)


def normals(key: np.uint64, counters: npt.NDArray[np.int64], columns: int) -> npt.NDArray[np.float64]:
    """Standard normals [n, columns] of n counters: SplitMix64 (Steele et al., OOPSLA 2014), then Box-Muller."""
    pairs = (columns + 1) // 2
    counted = counters.astype(np.uint64)[:, None] * np.uint64(pairs) + np.arange(pairs, dtype=np.uint64)
    bits = counted * _GOLDEN + key
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    radius = np.sqrt(-2 * np.log(((bits >> np.uint64(32)) + 0.5) * 2.0**-32))
    angle = (bits & np.uint64(0xFFFFFFFF)) * (2 * np.pi * 2.0**-32)
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)
    return both.reshape(len(counters), -1)[:, :columns]


def scatter(numbers: npt.NDArray[np.int64], key: np.uint32) -> npt.NDArray[np.int64]:
    """Maps the numbers below 2^32 one to one onto themselves, without visible order (MurmurHash3's finaliser)."""
    x = numbers.astype(np.uint32) ^ key
    x = (x ^ (x >> np.uint32(16))) * np.uint32(_MIX[0])
    x = (x ^ (x >> np.uint32(13))) * np.uint32(_MIX[1])
    return (x ^ (x >> np.uint32(16))).astype(np.int64)


def gather(scattered: npt.NDArray[np.int64], key: np.uint32) -> npt.NDArray[np.int64]:
    """The inverse of `scatter`."""
    x = scattered.astype(np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(pow(_MIX[1], -1, 1 << 32))
    x = (x ^ (x >> np.uint32(13)) ^ (x >> np.uint32(26))) * np.uint32(pow(_MIX[0], -1, 1 << 32))
    return ((x ^ (x >> np.uint32(16))) ^ key).astype(np.int64)
