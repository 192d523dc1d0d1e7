"""`python -m remora` is the `remora` command."""

from __future__ import annotations

import sys

from remora.cli.main import main

sys.exit(main())
