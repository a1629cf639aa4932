"""Parts that fit into other people's pipelines; each imports its third party only when asked."""
