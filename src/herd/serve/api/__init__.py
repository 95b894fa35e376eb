"""The endpoints: what requests may say, and how answers are written, one protocol a file."""
