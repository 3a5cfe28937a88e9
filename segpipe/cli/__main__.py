"""``python -m segpipe.cli``: the command line."""

from segpipe.cli.main import main

main()
