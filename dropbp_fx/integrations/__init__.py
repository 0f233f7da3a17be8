"""Callbacks for other packages' training loops. Nothing in the rest of the package imports them."""
