"""What the stages stand on: a subject a file."""
