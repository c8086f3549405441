"""The paper's rivals and the plain baselines, one file a method; each ends in a `DimensionPlan`.

They know tables, counts and TorchRec's tensors, and nothing of our models or trainer: `sseds_rec.harness` runs them.
Baselines that rank columns (magnitude, PCA energy, random) are criteria (`sseds_rec.search.criteria`).
"""
