"""A grid of methods, models, budgets and seeds on one data set: trained, measured, compared."""
