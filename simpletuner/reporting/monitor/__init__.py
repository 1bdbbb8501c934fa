"""A page that shows runs live: `history` keeps what happened, `server` receives it and serves the page in `static/`."""
