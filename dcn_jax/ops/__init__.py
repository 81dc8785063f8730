"""The ops, a folder for each."""
