"""Predicts the traffic and the time of recipes, and recommends one."""
