"""`python -m disco_trl` is `disco-trl`."""

from .cli import main


raise SystemExit(main())
