"""The HTTP door. A request goes down through the rooms, its tokens come up again.

    gateway     one gateway process, put together
    routes      what each path does, and how an answer is written out
    http        connections, keys, bodies, errors: HTTP that knows no model
    serving     intake (may it start?), dispatcher (where is it served, and what if that fails?), pump (what workers say),
                awaited (what they are asked for), journal (what was), inbox (on its way to the client)
    protocol    what bodies may say, and what answers look like
    text        tokens to text and back, stop strings

Each room imports only from those below it. Neighbours: `router` decides, `mail` carries, `core` below.
"""
