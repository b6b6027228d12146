"""What the command line does before and around a call: arguments, models, many pictures."""
