"""Posteriors of tasks: adapt, draw, predict, calibrate, save, load."""
