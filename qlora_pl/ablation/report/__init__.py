"""What a grid showed: numbers, the sentences they allow, pictures, and one page with all of it."""
