"""The quickstart's picture set: drawn, captioned and packed."""
