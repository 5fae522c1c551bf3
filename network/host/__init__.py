"""The process of a site: the jobs that it agreed to, each with its party in memory; bytes in, bytes out."""
