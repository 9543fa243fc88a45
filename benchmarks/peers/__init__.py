"""Clients for bytes from and to S3, each the way its own documents advise, behind one interface: see `base.Client`."""
