"""What a user may set: the schema, how files and options become it, and what is checked before anything runs."""
