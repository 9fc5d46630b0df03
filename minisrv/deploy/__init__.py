"""Other ways to serve than `minisrv serve`."""
