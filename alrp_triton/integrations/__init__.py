"""Ranking losses in the detectors of other libraries, a module for each, which needs that library."""
