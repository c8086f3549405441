"""`python -m sseds_rec`, the same as `sseds`; the form that torchrun starts."""

from sseds_rec.cli import main

main()
