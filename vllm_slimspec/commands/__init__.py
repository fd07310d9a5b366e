"""The command line of `slimspec`, with one module for each group of commands."""
