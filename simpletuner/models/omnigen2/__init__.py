"""OmniGen2: text to image, and editing with up to five input images."""
