"""What is served over HTTP: an ASGI application to serve, or routes to mount in your own. It needs the extra `web`."""
