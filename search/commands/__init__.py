"""Subcommands of `ffnas` beside the search itself, a file each; every one has `command(argv)`."""
