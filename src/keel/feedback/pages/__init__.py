"""The pages: one module for each part, each with a router."""
