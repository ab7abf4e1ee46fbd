"""The commands, a file for each group: ``add_GROUP_commands`` puts them on the command line that mlenv/cli.py makes."""
