"""Methods by name: one file a method or a family of them."""
