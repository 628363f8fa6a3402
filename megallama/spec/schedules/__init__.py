"""Pipeline schedules as data: lists of actions per rank, made by pure functions."""
