"""Native codec kernels. Codes of faults are `kvstore_s3.errors.BitstreamFault` numbers."""
