"""The data doctor: findings in a dataset, and the regression range that `reg_max` gives."""
