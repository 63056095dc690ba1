"""What is looked at before a command loads torch or writes anything: checks.py (the doors), prepare.py, sense.py."""
