"""The command line, progress and tables that the commands share."""
