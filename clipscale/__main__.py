"""`python -m clipscale`: the same as the console script."""

from clipscale.cli import main

raise SystemExit(main())
