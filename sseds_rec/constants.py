"""Numbers that the search, the report and the terminal must agree on; imports nothing heavy."""

#: Share of kept columns that another draw of the batches must keep, for a plan to be called stable.
STABLE = 0.9
