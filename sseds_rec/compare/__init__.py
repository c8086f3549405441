"""Methods of search side by side: the same budgets, data, tuning and seeds, as one grid of small runs."""
