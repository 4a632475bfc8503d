"""Measurements that are no stage: speed, and what the project is compared with."""
