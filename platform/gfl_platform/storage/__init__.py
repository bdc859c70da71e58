"""Files and S3 behind one interface; run folders."""
