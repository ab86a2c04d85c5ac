"""What a user starts from the command line."""
