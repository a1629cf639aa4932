"""What PatchCore is compared with, on the same features: short, readable, each checked against its formula in python_tests/test_rivals.py."""
