"""Worked examples. Run each as a module from the repository root."""
