"""`python -m disco_trl` is `disco-trl`."""

from .cli.main import main


raise SystemExit(main())
