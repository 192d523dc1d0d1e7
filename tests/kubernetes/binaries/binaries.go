//go:build binaries

// Package binaries names the programs of a Kubernetes node and control plane, so that `go mod tidy` keeps what they need.
// The staging modules of k8s.io/kubernetes have no released versions of their own in its go.mod: hence the replace lines.
package binaries

import (
	_ "go.etcd.io/etcd/server/v3"
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kube-controller-manager"
	_ "k8s.io/kubernetes/cmd/kube-proxy"
	_ "k8s.io/kubernetes/cmd/kube-scheduler"
	_ "k8s.io/kubernetes/cmd/kubectl"
	_ "k8s.io/kubernetes/cmd/kubelet"
)
