"""`python -m insightedit`, where the command is not on the path: as in a job of a cluster."""

from __future__ import annotations

from insightedit.cli import main

main()
