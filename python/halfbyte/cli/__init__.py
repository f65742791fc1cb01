"""The command `halfbyte`: one file a subcommand. Only this package turns errors into exits."""
