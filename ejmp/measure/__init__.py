"""Measure a model: throughput by block count, FLOPs, profiles, and what the machine could do."""
