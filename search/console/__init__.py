"""What stands between the programs and a terminal: argument reading, progress, the environment at start-up."""
