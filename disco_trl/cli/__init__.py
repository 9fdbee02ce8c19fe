"""The command line: a table of commands, and a file for each."""
