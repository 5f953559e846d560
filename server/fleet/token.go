package fleet

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"strings"
)

// A token says which start of which node its bearer is. It is made and read
// with the key alone, so it is good over restarts of the server.
//
//	NODE "." BOOT "." base64url(HMAC-SHA256(key, NODE "." BOOT))
//
// Neither a node's name nor a boot holds a dot.
func newToken(key []byte, node, boot string) string {
	who := node + "." + boot
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte("rookery token 1\x00" + who))
	return who + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

func openToken(key []byte, token string) (node, boot string, ok bool) {
	words := strings.Split(token, ".")
	if len(words) != 3 {
		return "", "", false
	}
	node, boot = words[0], words[1]
	return node, boot, hmac.Equal([]byte(token), []byte(newToken(key, node, boot)))
}
