"""One request, answered many times on a busy server: plain JAX beside jaxdet, in a page."""
