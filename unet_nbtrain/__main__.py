"""`python -m unet_nbtrain`: the command `unet-nbtrain` where it is not on the path."""

from unet_nbtrain.cli import main

raise SystemExit(main())
