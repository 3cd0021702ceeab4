"""``python -m structc``."""

from __future__ import annotations

from structc.cli import main

if __name__ == "__main__":
    main()
