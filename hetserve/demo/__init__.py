"""What `hetserve demo` is made of: what is asked, how an answer is followed, the live kill, and what is shown of it all."""
